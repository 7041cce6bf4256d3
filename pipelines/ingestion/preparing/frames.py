"""The reader of video (`models/media/video/video_reader.py`), by the names that ingest has for it."""

from models.media.video.video_reader import FrameReader, Loss, TimedFrame, presentation_times

__all__ = ["FrameReader", "Loss", "TimedFrame", "presentation_times"]
