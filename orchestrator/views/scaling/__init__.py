"""Pictures and the page of a sweep."""
