"""One reader per official format: what the annotations say, and where the images lie."""
