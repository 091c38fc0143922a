"""The student's weights in a sampler: loaded when an order asks for a version, kept until another is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog
from tutelage.v1.rollout_pb2 import SampleOrder
from tutelage_client.errors import TutelageError, invalid

from services.models.load import LoadedModel, load_causal_lm, load_weights
from student_trainer.lineage import Lineage
from student_trainer.policy_store import PolicyStore, PolicyVersion

log = structlog.get_logger(__name__)


class StudentPolicy:
    """A model that follows the policy store.

    Args:
        packed: also answer packed forwards (needed to rescore what another model sampled).
    """

    def __init__(
        self, store: PolicyStore, first: PolicyVersion, *, dtype: str, device: str, packed: bool
    ) -> None:
        self._store = store
        self._loaded = first
        self.loaded: LoadedModel = load_causal_lm(
            first.path, dtype=dtype, device=device, attention="packed" if packed else "plain"
        )
        if self.loaded.tokenizer is None:
            raise invalid(f"student.model: the policy in {first.path} has no tokenizer")

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def version(self) -> int:
        """The version whose weights are loaded."""
        return self._loaded.version

    @property
    def lineage(self) -> Lineage:
        """How the loaded weights came to be."""
        return self._loaded.lineage

    def ready(self, order: SampleOrder) -> bool:
        """Load what `order` asks for: exactly its version, else the newest that is not older.

        Returns:
            False while that version is not published.

        Raises:
            TutelageError: NOT_FOUND when an exact version has been deleted.
        """
        wanted = find_version(self._store, order)
        if wanted is None:
            return False
        if wanted.stamp != self._loaded.stamp:
            if not self._load(wanted):
                return False
            self._loaded = wanted
        return True

    def _load(self, wanted: PolicyVersion) -> bool:
        try:
            load_weights(self.model, wanted.path)
        except (TutelageError, OSError):
            # Deleted or replaced while it was read: look again. Anything else is an error.
            if self._store.get(wanted.version) == wanted:
                raise
            log.info("policy version replaced while loading", version=wanted.version)
            return False
        # Published anew meanwhile: some of the files may have been those of the other publication.
        return self._store.get(wanted.version) in (wanted, None)


def find_version(store: PolicyStore, order: SampleOrder) -> PolicyVersion | None:
    """The published version to sample `order` with, or None when it is still to come."""
    newest = store.latest()
    if newest is None or newest.version < order.policy_version:
        return None
    if not order.exact:
        return newest
    exact = store.get(order.policy_version)
    if exact is None and newest.version > order.policy_version:
        raise TutelageError(
            "NOT_FOUND",
            f"order {order.id}: policy version {order.policy_version} has been deleted from "
            f"{store.directory}; the newest is {newest.version}",
        )
    return exact


def end_ids(loaded: LoadedModel, model_path: Path | str) -> list[int]:
    """Tokens that end a response: the generation config's, and the tokenizer's end token."""
    found: set[int] = set()
    for source in (getattr(loaded.model, "generation_config", None), loaded.model.config):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    if loaded.tokenizer is not None and loaded.tokenizer.eos_token_id is not None:
        found.add(loaded.tokenizer.eos_token_id)
    if not found:
        raise invalid(f"model: {model_path} names no end token in its configuration or tokenizer")
    return sorted(found)
