"""Write one self-contained HTML page about one or several run folders, finished or not: curves, pictures, clips, evaluation, arguments."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastvideo.errors import UserError
from fastvideo.files import whole_file
from fastvideo.flags import check_numbers
from fastvideo.parallel import distributed
from fastvideo.report.charts import COLOURS, DASHES
from fastvideo.report.page import page
from fastvideo.report.read import read_runs


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; each gets a colour, and from the ninth on dashes too, up to 32."""
    output: Path | None = None
    """The page (default: report.html in the run's folder; of several runs, in the current one)."""
    window: int = 10
    """Iterations of the moving average."""
    clips: int = 4
    """Clips shown of each run, first and last samples of each; all that is shown is inside the page."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name one or more run folders, such as runs/quickstart")
        if len(self.runs) > COLOURS * DASHES:
            raise UserError(f"{len(self.runs)} runs are given, but {COLOURS * DASHES} at most can be told apart on one page")
        if self.output and self.output.is_dir():
            raise UserError(f"--output {self.output} is a folder: name a file in it")
        if self.output and not self.output.parent.is_dir():
            raise UserError(f"--output {self.output}: there is no folder {self.output.parent}")
        check_numbers(vars(self), {"1 or more": "window", "0 or more": "clips"})


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    runs = read_runs(args.runs)
    output = args.output or (args.runs[0] if len(runs) == 1 else Path()) / "report.html"
    text = page(runs, args.window, args.clips).encode("utf-8", "backslashreplace")
    with whole_file(output) as temporary:
        temporary.write_bytes(text)
    print(f"report: {output} ({len(text) / 2**20:.1f} MiB)")


if __name__ == "__main__":
    distributed.run(main)
