"""Linking: a trained model opened with its knowledge base, mentions given by hand or in bulk, links with scores."""
