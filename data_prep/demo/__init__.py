"""The demo's release: a made-up world of houses and their coats of arms, drawn by a seed, in the MIMIC layout."""
