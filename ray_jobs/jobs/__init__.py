"""Jobs of commands that may work on Ray, one file each."""
