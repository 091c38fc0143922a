"""`python -m launcher …` is `tutelage …`: how `tutelage up` starts its children."""

from launcher.parent_death import follow_parent

follow_parent()

from launcher.cli import main  # noqa: E402 - bound to the parent before anything slow is imported

main()
