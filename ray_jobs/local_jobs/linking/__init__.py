"""The command `dsmip link`: one mention, or files of them."""
