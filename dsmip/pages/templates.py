"""Templates of pages: everything that is put into them is escaped, and a name that is not given is an error."""

from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def page_environment(package: str) -> Environment:
    """Reads the templates that lie beside a package's modules."""
    return Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(package: str, name: str) -> Markup:
    """A style sheet or script that lies beside a package's modules; it goes into a page as it is."""
    return Markup(resources.files(package).joinpath(name).read_text(encoding="utf-8"))


def base_style() -> Markup:
    """The style sheet that all pages have: colours, light and dark, headings, tables, contents, cards."""
    return asset("dsmip.pages", "base.css")
