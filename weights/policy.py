"""What a guard judges by: the categories of unsafe content that its chat template writes into the prompt.

The names are those of the template of Llama Guard 3 Vision: `categories` and `excluded_category_keys`.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weights.chat_format import valid_text
from weights.messages import one_line, quoted


@dataclass(frozen=True)
class Policy:
    """Categories by their keys, as {"S1": "Violent Crimes."}; None: those of the template. `excluded` are the
    keys of categories to leave out. Raises ValueError with one line for anything else."""
    categories: Mapping[str, str] | None = None
    excluded: Sequence[str] = ()

    def __post_init__(self):
        if self.categories is not None:
            if not isinstance(self.categories, Mapping) or not self.categories:
                raise ValueError("categories must be a dict with at least one, as {'S1': 'Violent Crimes.'}, "
                                 f"not {quoted(self.categories)}")
            for key, text in self.categories.items():
                if not valid_text("key of a category", key).strip():
                    raise ValueError(f"the key of the category {quoted(text)} is empty")
                if not valid_text(f"category {quoted(key)}", text).strip():
                    raise ValueError(f"the category {quoted(key)} is empty: say what it is about")
        if not isinstance(self.excluded, (list, tuple)):
            raise ValueError(f"excluded categories must be a list of keys, not {quoted(self.excluded)}")
        for key in self.excluded:
            valid_text("key of an excluded category", key)
            if self.categories is not None and key not in self.categories:
                raise ValueError(f"the excluded category {quoted(key)} is none of "
                                 f"{one_line(', '.join(self.categories))}")
