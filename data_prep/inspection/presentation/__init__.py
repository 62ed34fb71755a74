"""The two forms of an inspection: `tables`, the same for a terminal and for the page, and the page itself."""
