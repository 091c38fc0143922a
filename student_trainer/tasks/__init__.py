"""Built-in tasks: prompts with structure and an exact checker, for runs without a data set."""

from student_trainer.tasks.task import Example, Task, load_task

__all__ = ["Example", "Task", "load_task"]
