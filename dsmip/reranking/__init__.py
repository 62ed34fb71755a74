"""Re-ranking: a second part scores what a first one ranks best. Ranks stay defined over the whole knowledge base."""
