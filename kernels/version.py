"""The pack's version, as pyproject.toml states it; it is written into every file made."""

VERSION = "0.1.0"
