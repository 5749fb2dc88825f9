"""Stages: the verbs. Each is one public function from records to records, with a version that is part of its key."""
