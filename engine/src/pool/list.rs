//! Doubly linked lists through slots of a table: O(1), no allocation.
//!
//! A slot is in at most one list per link; the table's owner says which link a list uses.

/// No slot.
pub(super) const NONE: u32 = u32::MAX;

/// A slot's neighbours in one list.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    prev: u32,
    next: u32,
}

impl Default for Link {
    fn default() -> Self {
        Self { prev: NONE, next: NONE }
    }
}

/// One list over a table of slots.
#[derive(Debug, Clone, Copy)]
pub(super) struct List {
    head: u32,
    tail: u32,
    len: u32,
}

impl Default for List {
    fn default() -> Self {
        Self { head: NONE, tail: NONE, len: 0 }
    }
}

impl List {
    pub(super) fn head(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }

    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    /// The slot behind `slot`.
    pub(super) fn next<T>(
        &self,
        table: &mut [T],
        slot: u32,
        link: impl Fn(&mut T) -> &mut Link,
    ) -> Option<u32> {
        let next = link(&mut table[slot as usize]).next;
        (next != NONE).then_some(next)
    }

    pub(super) fn push_front<T>(
        &mut self,
        table: &mut [T],
        slot: u32,
        link: impl Fn(&mut T) -> &mut Link,
    ) {
        *link(&mut table[slot as usize]) = Link { prev: NONE, next: self.head };
        match self.head {
            NONE => self.tail = slot,
            head => link(&mut table[head as usize]).prev = slot,
        }
        self.head = slot;
        self.len += 1;
    }

    pub(super) fn push_back<T>(
        &mut self,
        table: &mut [T],
        slot: u32,
        link: impl Fn(&mut T) -> &mut Link,
    ) {
        *link(&mut table[slot as usize]) = Link { prev: self.tail, next: NONE };
        match self.tail {
            NONE => self.head = slot,
            tail => link(&mut table[tail as usize]).next = slot,
        }
        self.tail = slot;
        self.len += 1;
    }

    /// Takes `slot`, which is in this list, out.
    pub(super) fn remove<T>(
        &mut self,
        table: &mut [T],
        slot: u32,
        link: impl Fn(&mut T) -> &mut Link,
    ) {
        let Link { prev, next } = std::mem::take(link(&mut table[slot as usize]));
        match prev {
            NONE => self.head = next,
            prev => link(&mut table[prev as usize]).next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => link(&mut table[next as usize]).prev = prev,
        }
        self.len -= 1;
    }

    /// Takes the first slot out.
    pub(super) fn pop_front<T>(
        &mut self,
        table: &mut [T],
        link: impl Fn(&mut T) -> &mut Link,
    ) -> Option<u32> {
        let slot = self.head()?;
        self.remove(table, slot, link);
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(list: &List, table: &mut [Link]) -> Vec<u32> {
        let mut found = Vec::new();
        let mut at = list.head();
        while let Some(slot) = at {
            found.push(slot);
            at = list.next(table, slot, |link| link);
        }
        assert_eq!(found.len(), list.len());
        found
    }

    #[test]
    fn ends_and_middles_come_out_in_order() {
        let mut table = [Link::default(); 5];
        let mut list = List::default();
        assert_eq!(list.pop_front(&mut table, |link| link), None);
        for slot in [1, 2, 3] {
            list.push_back(&mut table, slot, |link| link);
        }
        list.push_front(&mut table, 0, |link| link);
        assert_eq!(slots(&list, &mut table), [0, 1, 2, 3]);
        list.remove(&mut table, 2, |link| link);
        list.remove(&mut table, 3, |link| link);
        assert_eq!(slots(&list, &mut table), [0, 1]);
        list.push_back(&mut table, 4, |link| link);
        assert_eq!(list.pop_front(&mut table, |link| link), Some(0));
        assert_eq!(slots(&list, &mut table), [1, 4]);
        list.remove(&mut table, 1, |link| link);
        list.remove(&mut table, 4, |link| link);
        assert_eq!((list.head(), list.len()), (None, 0));
        list.push_front(&mut table, 2, |link| link);
        assert_eq!(slots(&list, &mut table), [2], "an emptied list works again");
    }
}
