"""Checks a data set for problems before training: `python -m lora_dist.audit --train_dir DIR …`.

Needs neither torch nor `datasets`. Exit codes: 0 no findings, 2 invalid settings, 3 warnings, 4 errors.
"""

import sys
from pathlib import Path

from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.settings.audit import AuditSettings, contradictions
from lora_dist.settings.cli import argv_or, parse

DESCRIPTION = """Check folders of images for problems before training: unreadable files, duplicates, leaks between
training and validation, classes with too few images, labels that are likely wrong. Writes a report, and a list of files
to leave out for lora_dist.train --exclude. Exit codes: 0 no findings, 2 invalid settings, 3 warnings, 4 errors."""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Audits the data, writes the report, and exits with the code of the worst finding."""
    settings = parse(
        AuditSettings,
        argv_or(argv),
        prog="lora_dist.audit",
        description=DESCRIPTION,
        contradictions=contradictions,
        takes_config=False,
    )
    # Imported here, because settings errors are reported before numpy and Pillow are loaded.
    from lora_dist.audit.audit import audit, write_report
    from lora_dist.audit.findings import exit_code
    from lora_dist.data.pixels.limits import allow_pixels
    from lora_dist.storage.writable import require_writable

    require_writable(Path(settings.run.output_dir))
    allow_pixels(settings.data.max_image_pixels)
    report = audit(settings)
    write_report(report, settings)
    sys.exit(exit_code(report.findings))


if __name__ == "__main__":
    run_command(main)
