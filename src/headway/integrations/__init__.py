"""headway inside other libraries: a module for each, which is imported only when it is asked for."""
