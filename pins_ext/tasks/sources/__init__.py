"""Where data comes from: embedded, published sets by name, files of one's own."""
