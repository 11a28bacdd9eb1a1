"""Photo search: rank the photographs of a folder by how well they match a description."""
