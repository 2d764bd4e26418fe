"""The watch: every rank says each second where it stands, so that one that is lost or late is named by those that wait for it."""

from protoclip_scale.engine.watch.watch import NoWatch, Watch, aside, begin

__all__ = ["NoWatch", "Watch", "aside", "begin"]
