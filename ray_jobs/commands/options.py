"""Options and arguments that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

import typer

DeviceName = Literal["auto", "cpu", "cuda"]
ConfigOption = Annotated[str, typer.Option("--config", help="A shipped configuration's name or a YAML file.")]
# Text: a Path would make s3:/bucket of s3://bucket.
DataOption = Annotated[str, typer.Option("--data", help="Dataset made by 'dsmip prepare': its directory or URI.")]
DataArgument = Annotated[
    str, typer.Argument(help="Dataset made by 'dsmip prepare': its directory or URI.", metavar="DATA")
]
MovedDataOption = Annotated[
    str | None, typer.Option("--data", help="Where the run's data lies, if it has moved: a directory or URI.")
]
RunOption = Annotated[str, typer.Option("--run", help="Run: a directory, or its URI in an object store.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="key=value of the configuration; may be repeated.")]
EntityText = Literal["attr", "desc"]
MentionText = Literal["sentence", "sentence+desc"]
ChooserName = Literal["lexical", "endpoint"]
TakeName = Literal["random", "first"]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Show Ray's own log.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Also write all of it to this file, as JSON.")
]
RunArgument = Annotated[str, typer.Argument(help="Run: a directory or a URI.", metavar="RUN")]
