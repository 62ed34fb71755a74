"""Growing: entities that are added to a bundle, removed from it and replaced in it, as segments of its index."""
