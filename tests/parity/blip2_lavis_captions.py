"""Captions of the LAVIS reference vectors, before LAVIS's caption processor changes them."""

CAPTIONS = (
    "A man in a red coat falls off his bicycle, in the street.",
    "Woman: (young), walking her dog! On the left...",
    "  ".join(f"street {i}" for i in range(40)),
)
