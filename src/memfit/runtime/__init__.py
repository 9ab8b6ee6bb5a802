"""The only rooms that touch torch: record, replay, measure, step."""
