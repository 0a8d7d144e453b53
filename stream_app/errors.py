"""Errors of the worker: the class says what happens next.

RerankError
  x SettingsError     the process must not start
  x TransientError    retry with backoff, then stop the worker; the batch stays unacked
    x StoreUnavailableError
    x StoreBehindError    Redis lost interactions that were applied: read them again
    x EpochError          the log's partition count changed: only a restarted worker may go on
      x ForeignRowsError  the rows are another model's: only a rebuild, or the other artefact, may go on
    x LogRecreatedError   the log is not the one that Redis was made from: only an operator may go on
    x OtherLogError       the same, told by the topic's id
    x ContestedRowsError  others write the same users: retried for as long as the partition may stand still
    x PublishError
    x ModelError          the model raised: lists fall back, interactions wait
  x PoisonError       dead-letter the record and go on
    x FeatureMismatchError
  x ArtefactError     the artefact must not serve; the model already loaded goes on
    x ArtefactHashError   a file is not what the manifest promises
    x ArtefactSpaceError  it would move or read rows otherwise than those that are there
    x ArtefactGoldenError it does not answer as it did at export

`schemas.codec.DecodeError` is poison as well; it lives with the codec.
"""

from typing import ClassVar

# What stands in place of a state space while a rebuild into it has begun and not ended.
REBUILDING = "rebuilding "


class RerankError(Exception):
    """Root of the tree; catch a branch, not the root."""


class SettingsError(RerankError):
    """The process must not start."""


class TransientError(RerankError):
    """Worth retrying; nothing was acked."""


class StoreUnavailableError(TransientError):
    """Redis did not answer in time, or answered that it cannot serve."""


class StoreBehindError(TransientError):
    """Redis has applied less of a partition than we know it had: it came back empty, or older.

    Nothing was written. The remedy is automatic: the interactions after `applied_offset` are read again.
    """

    def __init__(self, partition: int, applied_offset: int) -> None:
        """Say which partition, and up to which offset (-1: nothing) Redis still has it."""
        super().__init__(
            f"Redis has partition {partition} of interactions only up to offset {applied_offset}; nothing was written; "
            "what it lost is read again"
        )
        self.partition = partition
        self.applied_offset = applied_offset


class EpochError(TransientError):
    """The topic epoch that this worker writes in is over; nothing was written."""


class ForeignRowsError(EpochError):
    """The rows are of another state space than this artefact's; nothing was read as its own, nothing was written."""

    def __init__(self, said: str, ours: str) -> None:
        """Say which space the rows are of, by what stands in the log's hash, and which one was asked for."""
        begun = said.removeprefix(REBUILDING)
        state = f"a rebuild into state space {begun} has not ended" if begun != said else f"the rows are of {said}"
        super().__init__(
            f"state space {ours} of RERANK_ARTEFACT: {state}, so every user would start cold; nothing is served or "
            "written; stop the workers, run `rerank rebuild` with this artefact, start them (docs/operators.md, A new "
            "model; there is a way without a pause, and RERANK_REDIS__FOREIGN_ROWS=cold to let users start cold)"
        )


class LogRecreatedError(TransientError):
    """Redis has applied more of a partition than its log holds: offsets mean nothing any more, nothing is applied."""

    def __init__(self, partition: int, applied_offset: int, high_water_offset: int) -> None:
        """Say which partition, how far Redis has it and where its log ends."""
        super().__init__(
            f"partition {partition} of interactions ends before offset {high_water_offset}, but Redis has it up "
            f"to offset {applied_offset}: it was deleted and created again, or lost its end; its interactions "
            "would be taken for old ones, so none is applied; stop all workers, run `rerank reset-epoch`, start them"
        )
        self.partition = partition
        self.applied_offset = applied_offset


class OtherLogError(TransientError):
    """The topic of this name is not the one that Redis was made from: offsets mean nothing, nothing is applied."""

    def __init__(self, topic: str, known_id: str, found_id: str) -> None:
        """Say which topic, its id in Redis and its id on the broker."""
        super().__init__(
            f"topic {topic} has id {found_id}, but Redis was made from {known_id}: it was deleted and created again, "
            "or this broker is not the one; its interactions would be taken for old ones, so no more are applied; "
            "correct RERANK_KAFKA__BOOTSTRAP_SERVERS, or stop all workers, run `rerank reset-epoch`, start them"
        )


class ContestedRowsError(TransientError):
    """Others moved the same rows on, again and again; what was folded from them was refused each time."""


class PublishError(TransientError):
    """The broker did not acknowledge an output record."""


class ModelError(TransientError):
    """The model raised or returned another shape; lists fall back, interactions are not acked."""


class PoisonError(RerankError):
    """This record can never succeed; it becomes a dead letter."""


class FeatureMismatchError(PoisonError):
    """The record lacks what the model's features need."""


class ArtefactError(RerankError):
    """This artefact never serves. `outcome` is its label in `rerank_model_reload_total`."""

    outcome: ClassVar[str] = "load_error"


class ArtefactHashError(ArtefactError):
    """A file is missing, or not what the manifest promises."""

    outcome = "rejected_hash"


class ArtefactSpaceError(ArtefactError):
    """Sound, but of another state space than the rows in service."""

    outcome = "rejected_space"


class ArtefactGoldenError(ArtefactError):
    """The model does not give the answers that were recorded at export."""

    outcome = "rejected_golden"
