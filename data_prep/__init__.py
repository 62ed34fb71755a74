"""Raw releases to dataset directories, their inspection, and the demo's world."""
