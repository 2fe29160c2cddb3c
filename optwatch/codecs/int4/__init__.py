"""Half a byte an element: powers for signed slots, logarithms for second moments."""
