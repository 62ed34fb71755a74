"""Descriptions for mentions: of those that bear its name, the one that a chooser takes by the sentence."""
