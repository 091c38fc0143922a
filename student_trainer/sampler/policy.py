"""The student's weights in a sampler: loaded when an order asks for a version, kept until another is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
from tutelage.v1.rollout_pb2 import SampleOrder
from tutelage_client.errors import TutelageError, invalid

from services.models.load import LoadedModel
from student_trainer.lineage import Lineage
from student_trainer.policy_store import PolicyStore, PolicyVersion

log = structlog.get_logger(__name__)


class StudentPolicy:
    """Makes the models of a sampler follow the policy store.

    Args:
        first: the version that they hold now.
        load: replaces one model's weights by those of a directory; called in this order.
    """

    def __init__(
        self, store: PolicyStore, first: PolicyVersion, load: Sequence[Callable[[Path], object]]
    ) -> None:
        self._store = store
        self._load = tuple(load)
        self._loaded: PolicyVersion | None = first  # None: an attempt to load ended half-way

    @property
    def version(self) -> int:
        """The version whose weights are loaded, once `ready` said so."""
        return self._held.version

    @property
    def lineage(self) -> Lineage:
        """How the loaded weights came to be."""
        return self._held.lineage

    @property
    def _held(self) -> PolicyVersion:
        if self._loaded is None:
            raise TutelageError("INTERNAL", "no policy version is loaded as a whole")
        return self._loaded

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
        if wanted != self._loaded:
            self._loaded = None
            if not self._load_whole(wanted):
                return False
            self._loaded = wanted
        return True

    def _load_whole(self, wanted: PolicyVersion) -> bool:
        try:
            for load in self._load:
                load(wanted.path)
        except Exception:
            # Deleted or replaced while it was read, which every library puts in errors of its own:
            # look again. Anything else is an error.
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
