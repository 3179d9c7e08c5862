"""A network on one's own pictures: from files of all kinds to classes, embeddings and heat maps."""
