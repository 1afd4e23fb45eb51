"""The schema, read: every setting by its dotted key, arguments and files of settings, and errors in plain words."""

from lorasmith.settings.arguments import parsed
from lorasmith.settings.files import read_toml
from lorasmith.settings.messages import explained
from lorasmith.settings.schema import Setting, settings
from lorasmith.settings.values import configured, merged, nested, toml_of

__all__ = ["Setting", "configured", "explained", "merged", "nested", "parsed", "read_toml", "settings", "toml_of"]
