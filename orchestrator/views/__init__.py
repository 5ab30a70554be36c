"""Views: what people see, made from values: console, pictures, traces."""
