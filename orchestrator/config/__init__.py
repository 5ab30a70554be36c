"""Configuration: files of clusters (with their conditions), chips and jobs, from text with places to frozen values."""
