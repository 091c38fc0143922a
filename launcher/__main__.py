"""`python -m launcher …` is `tutelage …`: how `tutelage up` starts its children."""

if __name__ == "__main__":  # vLLM's worker processes import this module again under another name
    from launcher.parent_death import follow_parent

    follow_parent()

    from launcher.cli import main  # bound to the parent before anything slow is imported

    main()
