"""What a report is made of: sections of computed sentences, figures and tables."""

from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """One figure or table with the sentences that say what it shows.

    Attributes:
        title: heading.
        sentences: computed from the results, the message first.
        figure: or None.
        table: rows of cells, the header first; empty for none.
    """

    title: str
    sentences: tuple[str, ...]
    figure: Figure | None = None
    table: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Page:
    """A report before it is HTML.

    Attributes:
        title: of the page.
        findings: the answers, in a few computed sentences.
        sections: figures and tables.
        symbols: (symbol, meaning) of everything that is not explained where it stands.
    """

    title: str
    findings: tuple[str, ...]
    sections: tuple[Section, ...]
    symbols: tuple[tuple[str, str], ...]
