"""The field's benchmarks: prompts as their authors publish them, judges, distances, intervals."""
