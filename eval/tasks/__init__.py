"""Tasks: what policies are measured on; one file a family, registered by name."""
