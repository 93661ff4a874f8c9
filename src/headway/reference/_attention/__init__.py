"""The definition of attention, in modules named like those of headway's own."""
