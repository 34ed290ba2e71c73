"""The table of metrics, as the help of the commands that show effects has it."""

import textwrap

import click


class MetricHelp(click.Command):
    """A command whose help ends with what each metric is, out of the one table of them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the metrics, and then the examples."""
        formatter.write_paragraph()
        formatter.write("\n".join(metric_lines()) + "\n")
        super().format_epilog(ctx, formatter)


def metric_lines() -> list[str]:
    """What each metric is, in lines of 80 columns."""
    from deltapatch.results.metrics import NOTATION, definitions

    header, *rows = definitions()
    lines = ["Metrics:"]
    for name, equation, *rest in rows:
        told = [f"{word} {text}" for word, text in zip(header[2:], rest, strict=True) if text != "never"]
        said = "; ".join(told)
        lines += textwrap.wrap(f"{name:<16}{equation}", 78, initial_indent="  ", subsequent_indent=" " * 18)
        lines += textwrap.wrap(said, 78, initial_indent=" " * 18, subsequent_indent=" " * 18)
    return lines + textwrap.wrap(NOTATION, 78, initial_indent="  ", subsequent_indent="  ")
