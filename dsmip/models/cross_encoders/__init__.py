"""Systems with a second stage that reads a mention and an entity together, over the best of a first one."""
