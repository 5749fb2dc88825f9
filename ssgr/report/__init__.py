"""Reports: what runs found, from their result.json files."""
