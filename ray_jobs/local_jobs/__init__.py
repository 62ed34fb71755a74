"""Jobs of commands that run in this process and know no Ray, one file each."""
