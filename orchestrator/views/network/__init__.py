"""Views of networks and collectives: reports, tables and pictures."""
