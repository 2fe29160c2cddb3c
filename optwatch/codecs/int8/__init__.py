"""One byte an element: cube roots for signed slots, logarithms for second moments."""
