"""The commands `dsmip link` and `dsmip entities`: one mention, files of them, and changes of a bundle."""
