"""Worked problems: traces of the generated tasks, dialogues about them."""
