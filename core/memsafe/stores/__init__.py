"""Embeddings on disk: what a store's files look like, who writes them, who reads them. Knows no model and no device."""
