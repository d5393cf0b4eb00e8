"""Operations with their derivative rules and kernels; nothing here knows a model."""
