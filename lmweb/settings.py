"""Django settings. Everything that an installation can change comes from ``lmweb.env``; importing this has no side effects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from psycopg.conninfo import conninfo_to_dict

from lmweb import env
from lmweb.supervisor import discovery

BASE_DIR = Path(__file__).resolve().parent.parent
DATA_DIR = env.data_dir()
MODELS_DIR = DATA_DIR / "models"
LOGS_DIR = DATA_DIR / "logs"

DEBUG = env.flag("LMWEB_DEBUG")
SECRET_KEY = discovery.secret_key(DATA_DIR)
ALLOWED_HOSTS = env.items("LMWEB_ALLOWED_HOSTS")
CSRF_TRUSTED_ORIGINS = env.items("LMWEB_TRUSTED_ORIGINS")

INSTALLED_APPS = [
    "lmweb",
    "workers",
    "models_app",
    "chat",
    "api",
    "channels",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.postgres",
    "django.contrib.staticfiles",
    "django_htmx",
    "axes",
]

MIDDLEWARE = [
    "lmweb.middleware.PageMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "axes.middleware.AxesMiddleware",
]

ROOT_URLCONF = "lmweb.urls"
ASGI_APPLICATION = "lmweb.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    }
]

DATABASE_URL, REDIS_URL = discovery.service_urls(DATA_DIR)


def _database(url: str) -> dict[str, Any]:
    info = conninfo_to_dict(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": info.pop("dbname", "lmweb"),
        "USER": info.pop("user", ""),
        "PASSWORD": info.pop("password", ""),
        "HOST": info.pop("host", ""),
        "PORT": str(info.pop("port", "")),
        # Statements that a connection repeats are parsed and planned once, by the server.
        "OPTIONS": {"server_side_binding": True, "prepare_threshold": 3, **info},
        "CONN_MAX_AGE": 300,  # dead ones are found by lmweb.db
    }


DATABASES = {"default": _database(DATABASE_URL)}

# Small lossy notices only ("model list changed"); tokens travel through Redis Streams (workers/stream.py).
CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        # redis-py 8 gives sockets a 5 s timeout by default, which ends every idle subscription.
        "CONFIG": {"hosts": [{"address": REDIS_URL, "socket_timeout": None}]},
    }
}

AUTH_USER_MODEL = "lmweb.User"
AUTHENTICATION_BACKENDS = ["axes.backends.AxesStandaloneBackend", "django.contrib.auth.backends.ModelBackend"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 8}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
    {"NAME": "django.contrib.auth.password_validation.NumericPasswordValidator"},
]
AXES_FAILURE_LIMIT = 10
AXES_COOLOFF_TIME = 0.25  # hours
AXES_LOCKOUT_PARAMETERS = [["username", "ip_address"]]
AXES_RESET_ON_SUCCESS = True
AXES_VERBOSE = False
AXES_LOCKOUT_CALLABLE = "lmweb.views.locked_out"
CSRF_FAILURE_VIEW = "lmweb.views.csrf_failure"
LOGIN_URL = "sign-in"
LOGIN_REDIRECT_URL = "chat"
LOGOUT_REDIRECT_URL = "sign-in"

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LANGUAGE_CODE = "en"
LOCALE_PATHS = [BASE_DIR / "locale"]
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"
STATICFILES_DIRS = [BASE_DIR / "static"]
STATIC_ROOT = DATA_DIR / "static"
WHITENOISE_ALLOW_ALL_ORIGINS = False
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "lmweb.storage.StaticFilesStorage"},
}

SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_AGE = 30 * 24 * 3600
CSRF_COOKIE_SAMESITE = "Lax"
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if CSRF_TRUSTED_ORIGINS else None
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = bool(CSRF_TRUSTED_ORIGINS)
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

DATA_UPLOAD_MAX_MEMORY_SIZE = 32 * 1024 * 1024  # bodies are bounded before Django sees them: lmweb/asgi.py

NODE_NAME = env.text("LMWEB_NODE_NAME") or discovery.host_name()
NODE_TOKEN = env.text("LMWEB_NODE_TOKEN")
SERVER_URL = env.text("LMWEB_SERVER_URL").rstrip("/")
IS_LOCAL_WORKER = env.flag("LMWEB_LOCAL_WORKER")
CPU_THREADS = env.number("LMWEB_CPU_THREADS")
DEFAULT_CONTEXT_LENGTH = env.number("LMWEB_CONTEXT_LENGTH")
MODEL_LOADING_GUARDRAILS = env.text("LMWEB_MODEL_LOADING_GUARDRAILS").lower()
MODEL_MEMORY_BYTES = env.number("LMWEB_MODEL_MEMORY_MB") * 1000**2
JIT = env.flag("LMWEB_JIT")
JIT_TTL_SECONDS = env.number("LMWEB_JIT_TTL_SECONDS")
AUTO_EVICT = env.text("LMWEB_AUTO_EVICT").lower()
MODEL_TURN_SECONDS = env.number("LMWEB_MODEL_TURN_SECONDS")
USER_RUNNING_LIMIT = env.number("LMWEB_USER_RUNNING_LIMIT")
USER_WAITING_LIMIT = env.number("LMWEB_USER_WAITING_LIMIT")
MAX_UPLOAD_BYTES = env.number("LMWEB_MAX_UPLOAD_GB") * 1000**3
HF_ENDPOINT = env.text("HF_ENDPOINT").rstrip("/")
HF_TOKEN = env.text("HF_TOKEN")
HF_HUB_OFFLINE = env.flag("HF_HUB_OFFLINE")
OUTBOUND_HOSTS = frozenset(host.lower() for host in env.items("LMWEB_OUTBOUND_HOSTS"))
DOWNLOADS_AT_ONCE = env.number("LMWEB_DOWNLOADS_AT_ONCE")
DOWNLOADS_PER_PERSON = env.number("LMWEB_DOWNLOADS_PER_PERSON")
DOWNLOAD_BYTES_PER_SECOND = env.number("LMWEB_DOWNLOAD_MBIT") * 1_000_000 // 8
STEP_LOG = env.flag("LMWEB_STEP_LOG")

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"handlers": ["stderr"], "level": env.text("LMWEB_LOG_LEVEL").upper()},
    "loggers": {
        "django.request": {"level": "ERROR"},
        "httpx": {"level": "WARNING"},
        "httpx2": {"level": "WARNING"},  # its lines hold addresses with signatures
        "axes": {"level": "WARNING"},
        # A line per task would be two per request, on the way to its first token.
        "celery.worker.strategy": {"level": "WARNING"},
        "celery.app.trace": {"level": "WARNING"},
        "celery.beat": {"level": "WARNING"},
        "daphne": {"level": "WARNING"},
    },
}
