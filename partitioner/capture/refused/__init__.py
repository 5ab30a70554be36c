"""What of a forward cannot be captured, and how that is said."""
