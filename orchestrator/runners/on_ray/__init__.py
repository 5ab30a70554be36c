"""The Ray runner: actors that host chips, and the driver that steps them."""
