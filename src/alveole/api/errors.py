"""The one table from errors to HTTP."""

from starlette.responses import JSONResponse

from alveole.model.error import AlveoleError, ErrorCode

STATUS = {
    ErrorCode.INVALID: 400,
    ErrorCode.DENIED: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.EXISTS: 409,
    ErrorCode.CONFLICT: 409,
    ErrorCode.GONE: 410,
    ErrorCode.CANCELLED: 499,
    ErrorCode.INTERNAL: 500,
    ErrorCode.UNSUPPORTED: 501,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.TIMEOUT: 504,
    ErrorCode.EXHAUSTED: 507,
}


def error_body(error: AlveoleError) -> dict[str, dict[str, str]]:
    return {"error": {"code": error.code.value, "message": error.message, "hint": error.hint, "field": error.field}}


def error_response(error: AlveoleError) -> JSONResponse:
    return JSONResponse(error_body(error), status_code=STATUS[error.code])
