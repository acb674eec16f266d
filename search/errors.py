"""The root of every error this project raises on purpose.

Each class carries a stable `code`, the HTTP `status` it maps to, and a docstring that is its default message. A message
says what is wrong and names the way out.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RanksearchError(Exception):
    """Something went wrong inside ranksearch."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(self, message: str | None = None, **data: Any) -> None:
        """Keep the message and the facts a caller can act on.

        Args:
            message: One sentence for a person; the class docstring when omitted.
            data: JSON-serializable facts (`target`, `kept`, `minimum`, ...), shown beside the message.
        """
        self.message = message or (type(self).__doc__ or "").strip()
        self.data = data
        super().__init__(self.message)


class InvalidInput(RanksearchError):
    """The request cannot be carried out as it stands."""

    code = "invalid_input"
    status = 422


class ImpossibleBudget(InvalidInput):
    """No rank vector fits this budget."""

    code = "impossible_budget"


class UnsupportedModel(InvalidInput):
    """The model cannot be compressed."""

    code = "unsupported_model"


class ModelNotFound(InvalidInput):
    """There is no such model, or it holds no weights that may be read."""

    code = "model_not_found"


class UnsafeModel(InvalidInput):
    """The model would need code or a pickle to be executed, which is off."""

    code = "unsafe_model"


class BrokenWeights(InvalidInput):
    """A weight of the model is not finite."""

    code = "broken_weights"


class DatasetError(InvalidInput):
    """The dataset cannot be read as asked."""

    code = "dataset_error"


class PathNotAllowed(InvalidInput):
    """The path lies outside the folders this server may read."""

    code = "path_not_allowed"


class InvalidSettings(InvalidInput):
    """A setting of the server is not usable."""

    code = "invalid_settings"


class NotFound(RanksearchError):
    """There is nothing under this name."""

    code = "not_found"
    status = 404


class JobNotFound(NotFound):
    """There is no such job."""

    code = "job_not_found"


class Conflict(RanksearchError):
    """The job's present state does not allow this."""

    code = "conflict"
    status = 409


class NumericalError(RanksearchError):
    """A computation gave values that are not finite."""

    code = "numerical_error"


class OutOfMemory(RanksearchError):
    """The device or the machine ran out of memory."""

    code = "out_of_memory"


class StorageFull(RanksearchError):
    """The disk is full; free space and submit the job again."""

    code = "storage_full"
    status = 507


class ServerUnreachable(RanksearchError):
    """The server does not answer; start one with `ranksearch serve` or set RANKSEARCH_URL."""

    code = "server_unreachable"
    status = 503


class RequestRefused(RanksearchError):
    """The server refused the request."""

    code = "request_refused"


class BrokenDownload(RanksearchError):
    """What arrived is not what the server announced; fetch again."""

    code = "broken_download"
